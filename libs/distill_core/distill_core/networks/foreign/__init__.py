"""What other people's model folders say, and which of it is understood: no model library is imported here."""
