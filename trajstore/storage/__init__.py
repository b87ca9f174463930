"""The store's format: schema, codecs, layout, digests, locks, writer, reader.

Knows arrays, files and commits; knows nothing of problems, operators or engines. `docs/format.md` is the
specification that this package keeps.
"""
