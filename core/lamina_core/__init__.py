"""The machinery under Lamina's transforms: levels, interpreters, wrappers, dispatch, rule tables.

This package knows no transform and no op; see its README for the glossary and a reading order.
"""
