"""The SQL view: DuckDB over an index that is only a cache.

A query goes through these rooms: `index` brings Parquet files up to date with what is committed, `slabs` and `tables`
say what their rows are, `views` gives them names and macros, and `query` asks them on a connection that can read them
and nothing else. Unmeasured is NULL, diverged is NaN.
"""

from trajstore.reading.sql.query import answer, query_store, rows_of, write_answer
from trajstore.reading.sql.slabs import write_slab
from trajstore.reading.sql.text import literal
from trajstore.reading.sql.views import definitions_file

__all__ = ["answer", "definitions_file", "literal", "query_store", "rows_of", "write_answer", "write_slab"]
