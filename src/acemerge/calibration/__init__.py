"""What of the experts is measured on data of their own, for the rules that want it."""
