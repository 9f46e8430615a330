"""Many adapters on one model: batches that mix them, the bank that keeps them, continuous batching."""
