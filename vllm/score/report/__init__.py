"""What a run found, for people (`table`, `plots`, `page`) and for programs (`machine`)."""
