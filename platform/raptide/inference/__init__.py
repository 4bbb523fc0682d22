"""From a bundle to numbers: strings in, numpy arrays out. Knows neither Ray nor HTTP."""
