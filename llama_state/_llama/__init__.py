"""One libllama: find it, bind it, call it, free what it made. The only room that calls its C."""
