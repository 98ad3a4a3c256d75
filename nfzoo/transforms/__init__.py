"""Turn images into tensors: decoding, evaluation and training transforms, augmentation."""
