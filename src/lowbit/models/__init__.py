"""What lowbit knows about models: finding what can be packed, and what a family is."""
