"""Where all parts meet: compose -> check -> locate -> build -> fit -> evaluate -> export."""
