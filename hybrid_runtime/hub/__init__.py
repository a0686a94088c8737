"""Finds the files of a model: a path, a short name, or a repository on a hub, downloaded once and resumably."""
