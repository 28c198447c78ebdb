"""Great Expectations between staging and load; nothing else imports it."""
