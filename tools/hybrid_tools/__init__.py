"""Offline programs, one a file: each parses, calls the engine, prints and draws."""
