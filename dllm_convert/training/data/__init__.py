"""From files and data sets to rows of tokens: read, rendered, encoded, packed, stored."""
