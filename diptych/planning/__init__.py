"""How many workers a load needs: traces, modelled workers in virtual time, and the search."""
