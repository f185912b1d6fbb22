// llama.cpp's own loader of control vectors, which its Python package leaves out. argv[1] is the
// file; the floats of blocks 1, 2... go to standard output as llama.cpp would hand them on.
#include "common.h"

#include <cstdio>

int main(int, char ** argv) {
    const auto found = common_control_vector_load({{1.0f, argv[1]}});
    if (found.n_embd == -1) {
        return 1;
    }
    fwrite(found.data.data(), sizeof(float), found.data.size(), stdout);
    return 0;
}
