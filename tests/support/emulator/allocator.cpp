// torch's CPU allocator, which tells the emulator of every allocation: kernels then may touch nothing else.
#include <c10/core/Allocator.h>
#include <string.h>

extern "C" void emu_region(void* base, size_t bytes, const char* name, int output);
extern "C" void emu_forget(void* base);

namespace {

struct Held {
  c10::DataPtr inner;
  static void free(void* held) {
    Held* mine = static_cast<Held*>(held);
    emu_forget(mine->inner.get());
    delete mine;
  }
};

struct Tracking final : c10::Allocator {
  explicit Tracking(c10::Allocator* inner) : inner(inner) {}
  c10::DataPtr allocate(size_t bytes) override {
    c10::DataPtr data = inner->allocate(bytes);
    if (!data.get()) return data;
    void* base = data.get();
    const c10::Device device = data.device();
    emu_region(base, bytes, "a tensor", 0);
    return {base, new Held{std::move(data)}, Held::free, device};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
  c10::Allocator* inner;
};

}  // namespace

// from now on; tensors made before are unknown to the emulator
extern "C" void emu_track_tensors() {
  static Tracking tracking(c10::GetAllocator(c10::DeviceType::CPU));
  c10::SetAllocator(c10::DeviceType::CPU, &tracking, 255);
}
