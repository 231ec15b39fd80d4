"""The samples on which experts are observed, with what is known of them."""
