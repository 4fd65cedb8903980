"""What a run found, as a table or JSON (`table`), and drawn (`plots`)."""
