int linrnn_placeholder() { return 0; }
