"""Files of x-rays to grey pixels: decoding, DICOM, resizing, and the processes that do it safely."""
