// Which instruction set is used: the best that the machine has, or the one that FASTCKPT_ISA or fastckpt_use_isa names.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "fastckpt.h"
#include "kernels.h"

namespace fastckpt {
namespace {

struct Available {
    const Kernels* all[3]{};
    int count = 0;
    char names[32]{};

    Available() {
        for (const Kernels* one : {avx512_kernels(), avx2_kernels(), scalar_kernels()}) {
            if (!one) continue;
            all[count++] = one;
            if (names[0]) std::strcat(names, " ");
            std::strcat(names, one->name);
        }
    }
    const Kernels* find(const char* name) const {
        for (int i = 0; i < count; ++i)
            if (!std::strcmp(all[i]->name, name)) return all[i];
        return nullptr;
    }
};

const Available& available() {
    static const Available found;
    return found;
}

const Kernels* first() {
    const char* wanted = std::getenv("FASTCKPT_ISA");
    const Kernels* named = wanted ? available().find(wanted) : nullptr;
    return named ? named : available().all[0];
}

std::atomic<const Kernels*>& current() {
    static std::atomic<const Kernels*> chosen{first()};
    return chosen;
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

}  // namespace fastckpt

using namespace fastckpt;

extern "C" const char* fastckpt_isas(void) { return available().names; }
extern "C" const char* fastckpt_isa(void) { return kernels().name; }
extern "C" int fastckpt_use_isa(const char* name) {
    const Kernels* found = name ? available().find(name) : first();
    if (!found) return FASTCKPT_BAD_ARGUMENT;
    current().store(found, std::memory_order_relaxed);
    return FASTCKPT_OK;
}
