"""What a run says of itself: the manifest, the model card and the page."""
