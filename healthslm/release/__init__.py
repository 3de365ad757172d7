"""Release of a trained model: weights, results and the documents that describe them."""
