"""`fastblt tasks`: what a model solves with each decoder, and what that costs (Fast BLT 4.2, tables 3 to 10)."""
