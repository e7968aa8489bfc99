"""The numerics: symmetric products, solves and spectra, each with a slow float64 oracle in the tests."""
