"""What verbs do that are no training: a module for each, called by `api` and `cli`."""
