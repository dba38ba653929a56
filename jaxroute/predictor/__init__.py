"""Predictors of score and output length from a prompt's text: features, bucket classifiers, held-out metrics."""
