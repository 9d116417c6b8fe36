"""Records of fixed length: coefficients of the spectral transform at widths that integers alone decide.

`layout` derives the order of rows, the widths and the start of each record from what is sent; `quantizer` has the
cells and levels of each width, and `trellis` finds which of them to take; `reference` makes records in plain torch;
`cpu` calls the loops of `transform` and `records`. What each function takes and returns is said in `dispatch`. A GPU
does not call these steps one by one: `triton` codes a whole layer before the host waits, and writes a message.
"""
