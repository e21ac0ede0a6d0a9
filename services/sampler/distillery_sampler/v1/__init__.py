"""`distillery.v1`: its servicers and messages."""
