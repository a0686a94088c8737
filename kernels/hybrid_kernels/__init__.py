"""The arithmetic of a decoder: one folder an operation, each with a slow obvious reference; knows no model."""
