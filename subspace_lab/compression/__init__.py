"""Solutions as files: d numbers from which a whole model is rebuilt; coded in few bytes, with a bound on the error."""
