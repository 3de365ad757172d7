"""From a run to the model repository: weights, results and the pages that tell of them."""
