"""What a model is explained on: fixed images, batches, annotations."""
