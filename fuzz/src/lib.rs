//! Fuzz targets of Fulmar.
