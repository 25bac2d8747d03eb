"""What a trained model is worth. One file an evaluator; each runs over rows in which every image comes exactly once."""
