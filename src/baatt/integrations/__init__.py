"""Where a foreign model meets `ba_attention`: `baatt.enable` and one file a library. Importing registers nothing."""
