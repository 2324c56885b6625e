"""Training of what decoding methods need beside a checkpoint. Nothing here is imported for decoding."""
