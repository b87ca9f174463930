"""Callbacks with which the trainers of other libraries record: one file a library, imported only by who uses it."""
