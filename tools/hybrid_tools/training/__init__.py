"""Training small sparse models: what `hybrid-train` does, without its command line."""
