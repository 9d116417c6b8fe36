"""Records of fixed length: coefficients of the spectral transform at widths that integers alone decide.

`layout` derives the order of rows, the widths and the place of each record from what is sent; `quantizer` has the
cells and levels of each width; `reference` makes records in plain torch; `cpu` calls the loops of `transform` and
`records`; `dispatch` picks by device. What each function takes and returns is said in `dispatch`.

A GPU needs few launches: products, energies and moments a tile of tokens at a time; widths and starts of records by
a scan over the tokens' profiles; then one thread for each row of a group, whose warp's ballot is a word of a bit
plane; and a scan that compacts the escapes.
"""
