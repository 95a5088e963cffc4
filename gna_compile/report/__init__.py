"""Decisions for people and programs: rows, tables, JSON and graph diffs."""
