"""acemerge's rules in other libraries. Each module imports its library, and nothing else imports it."""
