"""Images to explain a model on: the probe, batches, data sets, annotations."""
