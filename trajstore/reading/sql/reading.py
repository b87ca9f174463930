"""What a query may be: one statement that DuckDB's parser calls a SELECT, whose every part only reads.

The type of a statement does not say enough: `WITH a AS (COPY … TO …) FROM a` is a SELECT, and so is what asks a table
function to run a text, or to read memory at an address. So the tree that the parser makes of it is looked through, and
only what is known to read is let through. Which files can be read is a matter of the connection's settings.
"""

from __future__ import annotations

from itertools import accumulate

import duckdb

from trajstore.errors import QueryError, choices

__all__ = ["reading", "reads"]

_QUERIES = frozenset({"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"})
_SOURCES = frozenset(
    {"BASE_TABLE", "SUBQUERY", "JOIN", "TABLE_FUNCTION", "EXPRESSION_LIST", "EMPTY", "PIVOT", "SHOW_REF"}
)
_ORDERS = frozenset({"ORDER_DEFAULT", "ASCENDING", "DESCENDING"})
_ENDS = ("_MODIFIER", "_TYPE_INFO")
"""ORDER BY, LIMIT and DISTINCT, and the parameters of types."""
_DEEPEST = 500
_FUNCTIONS = frozenset({
    "range", "generate_series", "unnest", "repeat", "repeat_row", "histogram", "histogram_values", "summary",
    "json_each", "json_tree", "duckdb_columns", "duckdb_databases", "duckdb_functions", "duckdb_keywords",
    "duckdb_schemas", "duckdb_settings", "duckdb_tables", "duckdb_types", "duckdb_views", "pragma_platform",
    "pragma_show", "pragma_table_info", "pragma_version", "pg_timezone_names",
})  # fmt: skip
"""Table functions that compute from their arguments, or tell what there is. Others read files, run texts, follow
pointers or change settings, or may do so in a DuckDB to come."""

_TREE = """
WITH nodes AS MATERIALIZED (FROM json_tree(json_serialize_sql($1::VARCHAR)))
SELECT
    max(n.atom->>'$') FILTER (n.key = 'type') AS kind,
    bool_or(n.key = 'class') AS expression,
    max(n.atom->>'$') FILTER (n.key = 'function_name') AS function,
    max(n.atom->>'$') FILTER (n.key = 'error_message') AS error,
    any_value(p.key) AS of,
    any_value(g.atom->>'$') AS owner
FROM nodes n
LEFT JOIN nodes p ON p.id = n.parent
LEFT JOIN nodes g ON g.parent = p.parent AND g.key = 'type' AND p.key = 'function'
WHERE n.key IN ('type', 'class', 'function_name', 'error_message')
GROUP BY n.parent
"""
"""A row for each part of a statement: its kind (expressions have a class as well), its function, and what it is of."""


def reads(kind: duckdb.StatementType) -> bool:
    """Tell whether a statement of some type can be one that only reads."""
    return kind in (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN)


def reading(connection: duckdb.DuckDBPyConnection, query: str) -> duckdb.Statement:
    """Return the statement of a query, or refuse it with the reason."""
    statement = _parsed(query)
    if statement.type == duckdb.StatementType.EXPLAIN:  # EXPLAIN ANALYZE runs what it explains
        _refuse_parts(connection, _explained(statement.query))
    else:
        _refuse_parts(connection, statement)
    return statement


def _parsed(query: str) -> duckdb.Statement:
    if _depth(query) > _DEEPEST:  # not every DuckDB survives that
        raise QueryError(f"parentheses are nested more than {_DEEPEST} deep")
    statements = duckdb.extract_statements(query)
    if len(statements) != 1:
        raise QueryError(f"give one statement; this has {len(statements)}")
    try:
        kind = statements[0].type
    except ValueError:  # a type that this package has no name for
        raise QueryError("only SELECT is possible here; a store is changed by recording") from None
    if kind == duckdb.StatementType.MULTI:
        raise QueryError("PIVOT takes several statements here: name its values, as in PIVOT … ON … IN (…)")
    if not reads(kind):
        raise QueryError(f"only SELECT is possible here, not {kind.name}; a store is changed by recording")
    return statements[0]


def _depth(query: str) -> int:
    text = query.encode()  # tokens are told in bytes
    tokens = (text[start : start + 1] for start, kind in duckdb.tokenize(query) if kind == duckdb.token_type.operator)
    return max(accumulate((token == b"(") - (token == b")") for token in tokens), default=0)


def _explained(query: str) -> duckdb.Statement:
    """Return what is explained: the first of the query's ends, token by token, that is a statement by itself.

    Nothing before it is: what stands between it and EXPLAIN is ANALYZE, or options in parentheses.
    """
    text = query.encode()  # tokens are told in bytes
    _, *tokens = (start for start, kind in duckdb.tokenize(query) if kind != duckdb.token_type.comment)
    for start in tokens:
        rest = text[start:].decode()
        try:
            duckdb.extract_statements(rest)
        except duckdb.ParserException:
            continue
        return _parsed(rest)
    raise QueryError("EXPLAIN what? Only SELECT is possible here")


def _refuse_parts(connection: duckdb.DuckDBPyConnection, statement: duckdb.Statement) -> None:
    """Refuse a SELECT that has parts which are not known to read."""
    functions = set()
    for kind, expression, function, error, of, owner in connection.execute(_TREE, [statement.query]).fetchall():
        if error is not None:
            raise QueryError(f"this cannot be asked here: {error}")
        if owner == "TABLE_FUNCTION" and of == "function":
            functions.add(str(function).lower())
        known = kind is None or kind in (*_QUERIES, *_SOURCES, *_ORDERS) or kind.endswith(_ENDS)
        if not expression and not known:
            what = kind.removesuffix("_NODE").removesuffix("_QUERY")
            raise QueryError(f"only SELECT is possible here, not {what}; a store is changed by recording")
    if others := functions - _FUNCTIONS:
        own = "SELECT function_name FROM duckdb_functions() WHERE function_type = 'table_macro' AND NOT internal"
        macros = {str(name) for (name,) in connection.execute(own).fetchall()}
        for function in sorted(others - macros):
            public = [name for name in macros if not name.startswith("_")]
            raise QueryError(f"table function {function!r} cannot be used here; {choices(function, public)}")
