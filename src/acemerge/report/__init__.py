"""What a run says of itself: the manifest and the model card."""
