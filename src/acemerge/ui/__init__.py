"""The page of `acemerge ui`: merging in a browser, on this machine alone."""
