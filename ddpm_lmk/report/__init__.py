"""Results to tables, curves and one self-contained page: `data` collects, `figures` draws, `page` lays it all out."""
