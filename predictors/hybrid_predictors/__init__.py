"""What decides which neurons are computed: predictors, their training, and selection rules."""
