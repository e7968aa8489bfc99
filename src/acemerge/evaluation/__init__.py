"""Is a merged model good: its score on every task, beside those of the experts."""
