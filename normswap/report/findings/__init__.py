"""What there is to say of a conversion, a comparison or a fine-tune, as data: pages, tables and JSON are made of it."""
