"""Networks: encoders, fusion, decoder and the growing classifier, assembled in `av_segmenter`."""
