"""Vectors in the weights: of a layer, of a model, of a checkpoint; and the formats of quantized weights."""
